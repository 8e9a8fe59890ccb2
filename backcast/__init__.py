"""Backcast: serve every historical version of an embedding from the latest one."""

from backcast.client import AsyncClient, Client, Embeddings, VersionInfo
from backcast.errors import BackcastError
from backcast.versions import Entity

__all__ = ["AsyncClient", "BackcastError", "Client", "Embeddings", "Entity", "VersionInfo"]
