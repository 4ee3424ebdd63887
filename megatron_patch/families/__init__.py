"""Every supported model family. Adding one is a module here and a line in ALL."""

from megatron_patch.families.deepseek_v2 import DEEPSEEK_V2
from megatron_patch.families.family import Family
from megatron_patch.families.llama import LLAMA
from megatron_patch.families.mistral import MISTRAL
from megatron_patch.families.mixtral import MIXTRAL
from megatron_patch.families.qwen1_5 import QWEN1_5, QWEN1_5_MOE

ALL: dict[str, Family] = {
    family.name: family for family in (MISTRAL, MIXTRAL, LLAMA, QWEN1_5, QWEN1_5_MOE, DEEPSEEK_V2)
}
