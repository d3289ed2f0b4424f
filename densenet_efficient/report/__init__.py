"""What a model is and how it runs, as tables: `explain` and `summary`. May import `models` and
below."""
