"""``sa3 train``: the training commands of ``sa3_torch``, imported when one is used."""

from __future__ import annotations

from importlib.util import find_spec

import click

from sa3_mlx.cli.group import LazyGroup, Sections

# section -> command -> (module, attribute, one line of help)
SECTIONS: Sections = {
    "Autoencoder": {
        "autoencoder": ("autoencoder.stage", "autoencoder", "Train a SAME autoencoder (stage 0)."),
        "distill-autoencoder": (
            "autoencoder.distill",
            "distill_autoencoder",
            "Train a small autoencoder for the latents of a large one.",
        ),
    },
    "Diffusion model": {
        "pretrain": ("flow.pretrain", "pretrain", "Train a diffusion model by flow matching (stage 1)."),
        "clap": ("clap.stage", "clap", "Train a model of how well texts describe latents, noisy ones too."),
        "ode-warmup": (
            "few_steps.ode_warmup",
            "ode_warmup",
            "Teach a model to reach its guided samples in one step (stage 2).",
        ),
        "posttrain": (
            "few_steps.posttrain",
            "posttrain",
            "Make a model good in few steps, without guidance (stage 3).",
        ),
        "lora": ("lora.stage", "lora", "Teach a model new sounds by an adapter: LoRA, DoRA, BoRA and their -xs forms."),
        "quantize": ("quantize.stage", "quantize", "Tune a model for few bits by distillation from itself."),
    },
}
FORMER = {"warmup": "ode-warmup"}  # names that commands had, which still work


class _Train(LazyGroup):
    package = "sa3_torch.train"
    sections = SECTIONS

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, [FORMER.get(args[0], args[0]), *args[1:]] if args else args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.table() and find_spec("torch") is None:
            raise click.ClickException("training needs PyTorch: pip install 'sa3[train]'")
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Train)
@click.option("--dry-run", is_flag=True, help="Of the stage that follows: print its plan, start and write nothing.")
def train(dry_run: bool) -> None:
    """Train an autoencoder or a diffusion model."""
