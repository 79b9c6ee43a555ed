"""An autoregressive image model in miniature: handwritten digits by class, decoded in parallel."""
