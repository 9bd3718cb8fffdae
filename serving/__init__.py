"""Serving: a run's artifact beside its base, behind one OpenAI-compatible endpoint of Ray Serve and vLLM."""
