"""The operations inside other libraries' models. A module here needs the library whose name it has."""
