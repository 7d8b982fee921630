"""The shared language: what a parallel plan is. Imports nothing but the standard library and PyYAML."""
