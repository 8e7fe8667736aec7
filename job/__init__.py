"""One YAML spec in, one verdict out: fine-tune a language model and measure the change."""

__version__ = "0.1.0"
