"""How pages are made from templates: every text that one is given is escaped."""

import pathlib

import jinja2


def environment(folder: pathlib.Path) -> jinja2.Environment:
  """The templates of a folder. A name that a template uses and is not given raises."""
  return jinja2.Environment(
    loader=jinja2.FileSystemLoader(folder),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
