"""Model runtimes behind one small interface; each module imports its own heavy library."""
