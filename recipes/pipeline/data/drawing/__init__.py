"""What the demo set shows: `draw_picture` draws one of its pictures."""

from recipes.pipeline.data.drawing.landscapes import SCENES
from recipes.pipeline.data.drawing.picture import Picture, draw_picture
from recipes.pipeline.data.drawing.shapes import CLASSES

__all__ = ["CLASSES", "SCENES", "Picture", "draw_picture"]
