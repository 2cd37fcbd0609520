class Replaced:
    """An object with some attributes replaced."""

    def __init__(self, real, **changes):
        self.__dict__.update(changes)
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)
