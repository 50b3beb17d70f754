"""What a run's model starts from, beside random weights."""

from __future__ import annotations

from config import ViTGPT2Config
from model import ImageCaptionModel
from utils import some
from weights.pretrained import read_parts


def initialise(
    config: ViTGPT2Config, encoder: str | None, decoder: str | None
) -> tuple[ViTGPT2Config, ImageCaptionModel]:
    """A model with pretrained parts (see weights.pretrained.read_parts) and fresh ones, and its config. Prints what was
    taken, left out and made new."""
    parts = read_parts(config, encoder, decoder)
    model = ImageCaptionModel.from_saved(parts)
    made = [name for name in model.state_dict() if name not in parts.tensors]
    print(f"taken       {parts.taken}\nleft out    {parts.left}\nmade new    {some(made)}")
    return model.config, model
