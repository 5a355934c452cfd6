"""Measures trained models; it never trains."""
