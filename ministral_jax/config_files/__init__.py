"""Config files of both published layouts, read into and written from ModelConfig."""

from .config_json import config_from_hf, hf_from_config, write_config_json
from .layout import CONFIG_FILE_NAMES, Layout, detect_layout, layout_of
from .params_json import DEFAULT_MAX_LENGTH, config_from_params, params_from_config, write_params_json
from .reading import read_config

__all__ = [
    "CONFIG_FILE_NAMES",
    "DEFAULT_MAX_LENGTH",
    "Layout",
    "config_from_hf",
    "config_from_params",
    "detect_layout",
    "hf_from_config",
    "layout_of",
    "params_from_config",
    "read_config",
    "write_config_json",
    "write_params_json",
]
