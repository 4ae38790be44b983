"""Pictures of reports and comparisons, drawn with Pillow.

Only this package needs Pillow; the engine does not import it by itself.
"""

from .comparison import draw_comparison
from .crosstalk import draw_crosstalk
from .errors import draw_errors
from .maps import draw_map
from .pages import report_pages, side_by_side
from .theme import DARK, LIGHT, THEMES, Theme

__all__ = [
    "DARK",
    "LIGHT",
    "THEMES",
    "Theme",
    "draw_comparison",
    "draw_crosstalk",
    "draw_errors",
    "draw_map",
    "report_pages",
    "side_by_side",
]
