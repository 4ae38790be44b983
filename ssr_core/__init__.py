"""SSR-Merge's engine: adapter files -> stacks -> taps -> Grams -> router -> merged adapter -> report.

Needs torch, safetensors and numpy; never imports ComfyUI. The README's section "The engine without
ComfyUI" shows the few calls that a merge takes.
"""

from .adapters import RESTS, Adapter, Conversion, ConvertOptions, DenseGroup, KeyRecord, LoRALayer, Rest
from .advice import prompt_warnings
from .again import largest_difference, rounding
from .atomic import atomic_path
from .calibration import Calibration
from .calibration_io import load_calibration, save_calibration
from .calibrator import Calibrator, assemble
from .combining import combine
from .compact import compact_report
from .compare import Comparison, compare
from .compression import LIMITS, CompressOptions, Limit, compress, plain_bytes
from .compression_report import CompressedLayer, CompressionReport
from .conversion import Converted, convert, converted_groups
from .emit import KEY_STYLES, KeyStyle, bytes_per_rank, change_tensors, to_tensors
from .errors import (
    CalibrationError,
    FileError,
    IncompatibleError,
    MemoryBudgetError,
    SolveError,
    SSRMergeError,
)
from .files import content_hash, read_safetensors, tensors_hash, write_safetensors
from .forward import ForwardLoRA
from .gram import GramStats
from .headless import calibrate, calibrate_sharded
from .heldout import HELD_OUT, HeldOut
from .input_hooks import InputLayer, SharingError, input_layers, whole_module
from .input_taps import InputCollector, InputTap
from .memory import MOMENTS_REMEDY, RECORD_REMEDY, MemoryNeed, check_memory, memory_need, moments_need
from .merge import MergeResult, check_unsupported, describe, merge
from .metadata import merge_metadata, with_recipe
from .method_lines import parse_method
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
from .osrm import InitResult, osrm_init
from .osrm_layer import REFIT_MODES, RefitMode, RefitOptions
from .osrm_options import INIT_STYLES, LAYER_CHOICES, InitOptions
from .osrm_recipe import OSRMRecipe, read_any
from .osrm_refit import RefitResult, osrm_refit, refit_markdown
from .osrm_report import init_markdown
from .padding import PaddingMode, TextRows
from .parse import read_adapter
from .ranks import Ranks, joined
from .recipe import Recipe, parse_recipe, read_recipe
from .recipe_parts import Source
from .recipe_runs import RecordUse, Run
from .recipe_schema import PASS_DEFAULTS, SCHEMA
from .records import TaskRecord, records_of
from .report import FileAccount, LayerReport, MergeReport
from .round_sums import with_rounds
from .rounds import ROUNDS, rounds_of
from .router import ANCHORS, Anchor
from .sampling import InputSample, SampleOptions
from .scene_lines import parse_scenes
from .scenes import Scene, SceneStats
from .signals.budget import MB
from .signals.cleaning import CleanRule, clean
from .signals.estimate import SMALL_RECORDS, SmallRecords, from_records
from .signals.factor import InputFactor
from .signals.identity import RecordIdentity
from .signals.library import Listed, RecordLibrary, listing_text
from .signals.record_io import RecordFile, open_record, save_record
from .signals.recorder import Recorder, finished, record, unknown_share
from .signals.shares import Share
from .signals.sketch import RecordOptions
from .stacks import LayerStack, Task, build_stacks
from .taps import Tap
from .targets import KeyMap, KeyTarget, Part, Target
from .triggers import TriggerWords, header_metadata, trigger_words
from .trust import check_graph, pack_path
from .updates import extend, keep, without
from .version import VERSION

__all__ = [
    "ANCHORS",
    "Adapter",
    "Anchor",
    "AverageMerge",
    "Calibration",
    "CalibrationError",
    "Calibrator",
    "CleanRule",
    "Comparison",
    "CompressOptions",
    "CompressedLayer",
    "CompressionReport",
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
    "HELD_OUT",
    "HeldOut",
    "INIT_STYLES",
    "IncompatibleError",
    "InitOptions",
    "InitResult",
    "InputCollector",
    "InputFactor",
    "InputLayer",
    "InputMoments",
    "InputSample",
    "InputTap",
    "KEY_STYLES",
    "KeyMap",
    "KeyRecord",
    "KeyStyle",
    "KeyTarget",
    "LAYER_CHOICES",
    "LIMITS",
    "LayerReport",
    "LayerStack",
    "Limit",
    "Listed",
    "LoRALayer",
    "MB",
    "METHODS",
    "MOMENTS_REMEDY",
    "RECORD_REMEDY",
    "MemoryBudgetError",
    "MemoryNeed",
    "MergeMethod",
    "MergeReport",
    "MergeResult",
    "MomentOptions",
    "NPLoRAMerge",
    "OSRMRecipe",
    "PASS_DEFAULTS",
    "PaddingMode",
    "PaperMerge",
    "Part",
    "REFIT_MODES",
    "RESTS",
    "ROUNDS",
    "Ranks",
    "Recipe",
    "RecordFile",
    "RecordIdentity",
    "RecordLibrary",
    "RecordOptions",
    "RecordUse",
    "Recorder",
    "RefitMode",
    "RefitOptions",
    "RefitResult",
    "Rest",
    "Run",
    "SCHEMA",
    "SMALL_RECORDS",
    "SSRMerge",
    "SSRMergeError",
    "SampleOptions",
    "Scene",
    "SceneStats",
    "Share",
    "SharingError",
    "SmallRecords",
    "SolveError",
    "Source",
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
    "bytes_per_rank",
    "calibrate",
    "calibrate_sharded",
    "change_tensors",
    "check_graph",
    "check_memory",
    "check_unsupported",
    "clean",
    "combine",
    "compact_report",
    "compare",
    "compress",
    "content_hash",
    "convert",
    "converted_groups",
    "describe",
    "extend",
    "finished",
    "from_records",
    "header_metadata",
    "init_markdown",
    "input_layers",
    "joined",
    "keep",
    "largest_difference",
    "listing_text",
    "load_calibration",
    "memory_need",
    "merge",
    "merge_metadata",
    "moments_need",
    "open_record",
    "osrm_init",
    "osrm_refit",
    "pack_path",
    "parse_method",
    "parse_recipe",
    "parse_scenes",
    "plain_bytes",
    "prompt_warnings",
    "read_adapter",
    "read_any",
    "read_recipe",
    "read_safetensors",
    "record",
    "records_of",
    "refit_markdown",
    "rounding",
    "rounds_of",
    "save_calibration",
    "save_record",
    "tensors_hash",
    "to_tensors",
    "trigger_words",
    "unknown_share",
    "whole_module",
    "with_recipe",
    "with_rounds",
    "without",
    "write_safetensors",
]
