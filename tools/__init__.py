"""Tools for developers: the build, the checks that CI runs."""
