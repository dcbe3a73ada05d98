"""Implicit priors: one interface, a registry, one file per kind."""

from tdpm_ext.priors.base import ImplicitPrior
from tdpm_ext.priors.gaussian import GaussianPrior
from tdpm_ext.priors.generator import GeneratorPrior
from tdpm_ext.priors.io import PriorFileError, load_prior, save_prior
from tdpm_ext.priors.lowrank import LowRankPrior
from tdpm_ext.priors.mixture import MixturePrior
from tdpm_ext.priors.raw import RawPrior
from tdpm_ext.priors.registry import get_prior, list_priors, register_prior
from tdpm_ext.priors.shared import SharedPrior
from tdpm_ext.priors.source import SourcePrior
from tdpm_ext.priors.text import TextLowRankPrior, TextMixturePrior

__all__ = [
    "GaussianPrior",
    "GeneratorPrior",
    "ImplicitPrior",
    "LowRankPrior",
    "MixturePrior",
    "PriorFileError",
    "RawPrior",
    "SharedPrior",
    "SourcePrior",
    "TextLowRankPrior",
    "TextMixturePrior",
    "get_prior",
    "list_priors",
    "load_prior",
    "register_prior",
    "save_prior",
]
