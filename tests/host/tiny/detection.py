"""Lets a checkpoint say what it is, for families whose detection hard-codes the real model's sizes.

Only the detection step is replaced, and only for files that carry the metadata key: model class,
layers, patcher and sampler are the host's own.
"""

import json

import comfy.model_detection
import comfy.supported_models

METADATA_KEY = "tiny_model_config"


def describe(config_class: str, unet_config: dict) -> dict[str, str]:
    """Safetensors metadata that makes a file of this kind detectable."""
    return {METADATA_KEY: json.dumps({"class": config_class, "unet_config": unet_config})}


def install() -> None:
    detect = comfy.model_detection.model_config_from_unet
    if getattr(detect, "reads_tiny_metadata", False):
        return

    def from_metadata(state_dict, unet_key_prefix, use_base_if_no_match=False, metadata=None):
        if metadata is None or METADATA_KEY not in metadata:
            return detect(state_dict, unet_key_prefix, use_base_if_no_match, metadata)
        stored = json.loads(metadata[METADATA_KEY])
        return getattr(comfy.supported_models, stored["class"])(stored["unet_config"])

    from_metadata.reads_tiny_metadata = True
    comfy.model_detection.model_config_from_unet = from_metadata
