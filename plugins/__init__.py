"""Built-in plugins: optimizers, credit methods, curricula, combiners, aggregators, people, the
reward model, the demo."""
