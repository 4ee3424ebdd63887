"""Every supported model family. Adding one is a module here and a line in ALL."""

from megatron_patch.families.family import Family
from megatron_patch.families.mistral import MISTRAL

ALL: dict[str, Family] = {family.name: family for family in (MISTRAL,)}
