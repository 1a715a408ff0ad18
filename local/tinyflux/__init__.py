"""A small text-to-image model of Flux's architecture (4 million weights, 12 colours, 9 shapes, 10 landscapes) in plain torch."""
