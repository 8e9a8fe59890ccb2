#!/bin/sh
# Makes the secrets that docker-compose.yml mounts, in the folder secrets/ of the checkout.
#
# The folder keeps others out. The files in it can be read by all, for the users in the containers
# are not the one who made them.
set -eu
mkdir -m 700 secrets || {
    echo "error: passwords are set when the databases are made. To start anew, delete secrets/ and the volumes." >&2
    exit 1
}

password() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

owner=$(password)
service=$(password)
redis=$(password)
umask 0333
printf %s "$(password)" > secrets/postgres_password
printf %s "$owner" > secrets/owner_password
printf %s "$service" > secrets/service_password
printf %s "$redis" > secrets/redis_password
printf %s "$(password)" > secrets/grafana_password
printf %s "postgresql+psycopg://backcast_owner:$owner@postgres:5432/backcast" > secrets/owner_database_url
printf %s "postgresql+psycopg://backcast:$service@postgres:5432/backcast" > secrets/database_url
printf %s "redis://:$redis@redis:6379/0" > secrets/store_url
