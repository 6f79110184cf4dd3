"""Config files of both published layouts, read into and written from ModelConfig."""

from .layout import CONFIG_FILE_NAMES, Layout, detect_layout, layout_of

__all__ = ["CONFIG_FILE_NAMES", "Layout", "detect_layout", "layout_of"]
