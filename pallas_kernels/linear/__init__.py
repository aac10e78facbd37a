"""Linear attention: chunked forms whose time is linear in length, with state in and state out.

Stability: experimental.
"""
