"""``sa3 train``: the training commands of ``sa3_torch``, imported when one is used."""

from __future__ import annotations

from importlib.util import find_spec

import click

from sa3_mlx.cli.group import LazyGroup, Sections
from sa3_mlx.cli.home import find_model

# section -> command -> (module, attribute, one line of help)
SECTIONS: Sections = {
    "Autoencoder": {
        "autoencoder": ("cli", "autoencoder", "Train a SAME autoencoder (stage 0)."),
        "distill-autoencoder": (
            "cli",
            "distill_autoencoder",
            "Train a small autoencoder for the latents of a large one.",
        ),
    },
    "Diffusion model": {
        "pretrain": ("cli", "pretrain", "Train a diffusion model by flow matching (stage 1)."),
        "clap": ("cli", "clap", "Train a model of how well texts describe latents, noisy ones too."),
        "warmup": ("cli", "warmup", "Teach a model to reach its guided samples in one step (stage 2)."),
        "posttrain": ("cli", "posttrain", "Make a model good in few steps, without guidance (stage 3)."),
        "lora": ("cli", "lora", "Teach a model new sounds by an adapter: LoRA, DoRA, BoRA and their -xs forms."),
        "quantize": ("cli", "quantize", "Tune a model for few bits by distillation from itself."),
    },
}


class _Train(LazyGroup):
    package = "sa3_torch.train"
    sections = SECTIONS

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.table() and find_spec("torch") is None:
            raise click.ClickException("training needs PyTorch: pip install 'sa3[train]'")
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Train)
@click.option("--dry-run", is_flag=True, help="Of the stage that follows: print its plan, start and write nothing.")
@click.pass_context
def train(ctx: click.Context, dry_run: bool) -> None:
    """Train an autoencoder or a diffusion model."""
    ctx.meta["sa3.train.dry_run"] = dry_run
    ctx.obj = lambda name: find_model(name, generates=True).folder  # what the commands know of installed models
