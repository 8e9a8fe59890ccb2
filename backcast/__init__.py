"""Backcast: serve every historical version of an embedding from the latest one."""

from backcast.client import Client, Embeddings, VersionInfo
from backcast.errors import BackcastError
from backcast.versions import Entity

__all__ = ["BackcastError", "Client", "Embeddings", "Entity", "VersionInfo"]
