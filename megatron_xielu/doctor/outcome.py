"""What a check can say besides what it measured."""


class Failed(Exception):
    """The feature does not do what it should; the text says what was found."""


class Skipped(Exception):
    """This machine cannot show it; the text says why."""
