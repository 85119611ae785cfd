"""Parts of ``tools/golden.py`` and ``tools/resume_across.py``, which know relicctl only by its commands and files."""
