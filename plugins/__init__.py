"""Built-in plugins: optimizers, credit methods, combiners, the demo."""
