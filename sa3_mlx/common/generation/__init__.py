"""Go from a request to a sound: plan, schedule, noise, regions, memory, run, events."""
