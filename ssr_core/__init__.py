"""SSR-Merge's engine: adapter files -> stacks -> taps -> Grams -> router -> merged adapter -> report.

Needs torch, safetensors and numpy; never imports ComfyUI. The README's "Headless" section shows the
few calls that a merge takes.
"""

from .adapters import RESTS, Adapter, Conversion, ConvertOptions, DenseGroup, KeyRecord, LoRALayer, Rest
from .advice import prompt_warnings
from .calibration import Calibration, Calibrator, assemble
from .calibration_io import load_calibration, save_calibration
from .compact import compact_report
from .conversion import Converted, convert, converted_groups
from .emit import KEY_STYLES, KeyStyle, change_tensors, to_tensors
from .errors import (
    CalibrationError,
    FileError,
    IncompatibleError,
    MemoryBudgetError,
    SolveError,
    SSRMergeError,
)
from .files import atomic_path, content_hash, read_safetensors, tensors_hash, write_safetensors
from .forward import ForwardLoRA
from .gram import GramStats
from .headless import calibrate
from .input_hooks import InputLayer, SharingError, input_layers, whole_module
from .input_taps import InputCollector, InputTap
from .memory import MOMENTS_REMEDY, MemoryNeed, check_memory, memory_need, moments_need
from .merge import MergeResult, check_unsupported, describe, merge
from .metadata import merge_metadata
from .methods import (
    DIRECTIONS,
    METHODS,
    AverageMerge,
    Directions,
    GainsMerge,
    MergeMethod,
    NPLoRAMerge,
    PaperMerge,
    SSRMerge,
    SumMerge,
)
from .moments import FEATURES, Features, InputMoments, MomentOptions
from .osrm import InitResult, init_markdown, osrm_init
from .osrm_layer import REFIT_MODES, RefitMode, RefitOptions
from .osrm_refit import RefitResult, osrm_refit, refit_markdown
from .padding import PaddingMode, TextRows
from .parse import read_adapter
from .records import TaskRecord, records_of
from .report import FileAccount, LayerReport, MergeReport
from .router import ANCHORS, Anchor
from .sampling import InputSample, SampleOptions
from .stacks import LayerStack, Task, build_stacks
from .taps import Tap
from .targets import KeyMap, KeyTarget, Part, Target
from .triggers import TriggerWords, header_metadata, trigger_words
from .version import VERSION

__all__ = [
    "ANCHORS",
    "Adapter",
    "Anchor",
    "AverageMerge",
    "Calibration",
    "CalibrationError",
    "Calibrator",
    "Conversion",
    "ConvertOptions",
    "Converted",
    "DIRECTIONS",
    "DenseGroup",
    "Directions",
    "FEATURES",
    "Features",
    "FileAccount",
    "FileError",
    "ForwardLoRA",
    "GainsMerge",
    "GramStats",
    "IncompatibleError",
    "InitResult",
    "InputCollector",
    "InputLayer",
    "InputMoments",
    "InputSample",
    "InputTap",
    "KEY_STYLES",
    "KeyMap",
    "KeyRecord",
    "KeyStyle",
    "KeyTarget",
    "LayerReport",
    "LayerStack",
    "LoRALayer",
    "METHODS",
    "MOMENTS_REMEDY",
    "MemoryBudgetError",
    "MemoryNeed",
    "MergeMethod",
    "MergeReport",
    "MergeResult",
    "NPLoRAMerge",
    "MomentOptions",
    "PaddingMode",
    "PaperMerge",
    "Part",
    "REFIT_MODES",
    "RESTS",
    "RefitMode",
    "RefitOptions",
    "RefitResult",
    "Rest",
    "SSRMerge",
    "SSRMergeError",
    "SampleOptions",
    "SharingError",
    "SolveError",
    "SumMerge",
    "Tap",
    "Target",
    "Task",
    "TaskRecord",
    "TextRows",
    "TriggerWords",
    "VERSION",
    "assemble",
    "atomic_path",
    "build_stacks",
    "calibrate",
    "change_tensors",
    "check_memory",
    "check_unsupported",
    "compact_report",
    "content_hash",
    "convert",
    "converted_groups",
    "describe",
    "header_metadata",
    "init_markdown",
    "input_layers",
    "load_calibration",
    "memory_need",
    "merge",
    "merge_metadata",
    "moments_need",
    "osrm_init",
    "osrm_refit",
    "prompt_warnings",
    "read_adapter",
    "read_safetensors",
    "records_of",
    "refit_markdown",
    "save_calibration",
    "tensors_hash",
    "to_tensors",
    "trigger_words",
    "whole_module",
    "write_safetensors",
]
