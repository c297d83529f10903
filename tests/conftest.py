"""Puts the project's folder on the path, so that pytest finds its files however it is started."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
