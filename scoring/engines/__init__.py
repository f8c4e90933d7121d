"""The engines: what runs a predictor's network on named arrays. Which one a run uses is `engine.py`'s choice."""
