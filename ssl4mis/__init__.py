"""Semi-supervised medical image segmentation under one protocol: methods, training, scoring, comparing."""

__version__ = "0.1.0"
