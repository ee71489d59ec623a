"""Run measurements, ``python -m benchmarks``; the last line of a measuring command is one line of JSON."""

from __future__ import annotations

import sys

import click

from sa3_mlx.cli.group import LazyGroup, Sections, run_group

# a module is imported when its command runs, so that speed needs only one twin
SECTIONS: Sections = {
    "Speed and memory": {
        "latency": ("speed.latency", "latency", "Time a generation, stage by stage, and what it costs."),
        "serving": ("speed.serving", "serving", "Requests to a resident server, beside a process for each sound."),
        "memory": ("speed.memory", "memory", "Peak memory of every phase: predicted and measured."),
        "graph": ("speed.graph", "graph", "Kernels, copies and passes of a block, counted on its graph."),
        "roofline": ("speed.roofline", "roofline", "Least time that a chip's arithmetic and memory allow."),
        "peer": ("peer.peer", "peer", "Our speed beside that of the official MLX port, in one process."),
        "conversion": ("peer.conversion", "conversion", "The port's files in and out: outputs, time, peak memory."),
        "first-hour": ("peer.first_hour", "first_hour", "What a new user waits for: get, first and second sound."),
        "data-path": ("speed.data_path", "data_path", "CPU-seconds of a training step's data at full scale."),
        "plans": ("speed.plans", "plans", "Memory and speed of all trainings at full scale, counted."),
        "train-step": ("speed.train_step", "train_step", "Time a step of stage 0 and its parts."),
        "gpu": ("gpu.command", "gpu", "Everything that only an NVIDIA GPU can tell, in nine minutes."),
        "mac": ("mac.command", "mac", "Everything that only a Mac can tell, in about ten minutes."),
        "report": ("speed.report", "report", "Markdown table of what was measured, published and modelled."),
    },
    "Quality": {
        "adherence": ("quality.adherence", "adherence", "Share of prompts that a judge finds as asked."),
        "reconstruction": ("quality.reconstruction", "reconstruction", "How well the autoencoder gives sounds back."),
        "latents": ("quality.latents", "latents", "Statistics of latents, and what can be read from them."),
        "precision": ("quality.precision", "precision", "What every precision costs in quality and saves in bytes."),
        "bells": ("quality.bells", "bells", "Write a sound that the demo model does not know, to teach it."),
        "new-sound": ("quality.new_sound", "new_sound", "What an adapter taught a model, and what it took from it."),
        "renoising": ("quality.renoising", "renoising", "What ping-pong sampling keeps of a prompt, step by step."),
        "few-steps": ("quality.few_steps.command", "few_steps", "Models at 1, 2, 4 and 8 evaluations, in one table."),
        "music-adherence": ("quality.music_adherence", "music_adherence", "What of prompts of music a model makes."),
        "music-edits": ("quality.music_edits", "music_edits", "What of tempo and key edited music keeps, its seams."),
        "music-set": (
            "quality.music_set",
            "music_set",
            "What the rendered set of music holds, and what is heard of it.",
        ),
        "drift": ("quality.drift", "drift", "How a piece of an hour drifts, with and without the anchor."),
        "over-time": ("quality.over_time", "over_time", "One instrument after the other: by frames, by windows."),
        "music-runs": ("music.runs", "runs", "What is special about music, once each with a model of a real size."),
        "pitches": ("music.pitches", "pitches", "Whether notes without an end keep their pitch."),
        "seams": ("music.seams", "seams", "Where kept and made sound meet: feathers, continuations."),
        "loops": ("music.loops", "loops_command", "Ways to make a loop, by the score of its joint."),
        "best-of": ("music.best_of", "best_of", "What choosing the best of several sounds gains, by the judge."),
        "variation": ("quality.variation", "variation", "Audio-to-audio with both schedules."),
    },
    "What ships": {
        "ship": ("shipping.ship", "ship", "Put two trained models into the package as demo and demo-base."),
        "gallery": ("shipping.gallery", "gallery", "Six prompts of the demo: sounds, pictures and the table of them."),
    },
}


class _Benchmarks(LazyGroup):
    package = "benchmarks"
    sections = SECTIONS


COMMANDS = _Benchmarks.table()


@click.group(cls=_Benchmarks)
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def main() -> None:
    """Run measurements of sa3."""


if __name__ == "__main__":
    sys.exit(run_group(main, sys.argv[1:], "python -m benchmarks"))
