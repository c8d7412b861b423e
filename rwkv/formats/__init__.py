"""File formats of other programs: their tensor names, shapes and files."""
