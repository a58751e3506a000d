"""Perception coherence: train a student to order points as its teacher does."""

from . import ops as ops  # declares the operators
from . import reference
from .backends import available_backends
from .bank import CandidateBank
from .cached import cached_backward
from .diagnostics import Diagnosis
from .loss import PerceptionCoherenceLoss, perception_coherence_loss, soft_rank
from .metrics import Coherence, coherence
from .transport import OptimalTransportLoss, optimal_transport_loss

__version__ = "0.1.0"

__all__ = [
    "CandidateBank",
    "Coherence",
    "Diagnosis",
    "OptimalTransportLoss",
    "PerceptionCoherenceLoss",
    "__version__",
    "available_backends",
    "cached_backward",
    "coherence",
    "optimal_transport_loss",
    "perception_coherence_loss",
    "reference",
    "soft_rank",
]
