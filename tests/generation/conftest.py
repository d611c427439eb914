"""The models of the package, and their users."""

from demo_users import demo, make_users  # noqa: F401
