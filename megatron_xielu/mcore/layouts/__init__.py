"""Train one small model cut in every way and compare: the part of `doctor --layouts` in a rank."""
