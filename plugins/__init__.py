"""Built-in plugins: optimizers, credit methods, combiners, aggregators, people, the reward model,
the demo."""
