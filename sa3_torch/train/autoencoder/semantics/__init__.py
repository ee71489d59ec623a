"""Define networks beside the autoencoder that shape its latents [T1.4.3] to [T1.4.5].

Each has ``loss(...)`` -> raw terms by name, ``weights`` of those that are minimised (the others are measures), and a
``detach`` argument that keeps the gradient from the latents.
"""

from .alignment import Alignment, AlignmentConfig
from .critic import Corruptions, Critic, CriticConfig
from .regressors import OFFICIAL, ChromaBand, Regressors, RegressorsConfig
from .terms import Semantics, SemanticsConfig

__all__ = [
    "OFFICIAL",
    "Alignment",
    "AlignmentConfig",
    "ChromaBand",
    "Corruptions",
    "Critic",
    "CriticConfig",
    "Regressors",
    "RegressorsConfig",
    "Semantics",
    "SemanticsConfig",
]
