"""report.html: the run as one self-contained page, in English and Chinese."""
