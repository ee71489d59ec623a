"""From a request to a plan: sampling, schedule, noise, regions, memory, events."""
