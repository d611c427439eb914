"""The operations in other libraries' models. Each module needs the library that it is named after."""
