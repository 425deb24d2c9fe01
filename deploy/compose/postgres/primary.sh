#!/bin/sh
# Roles, database and replication slot of a new Postgres; its image runs this once, before it takes connections.
#
# In: three passwords, by the environment. Never: runs again on a database that is there.
set -eu
psql -v ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname postgres <<SQL
CREATE ROLE waypost_owner LOGIN PASSWORD '$OWNER_PASSWORD';
CREATE ROLE waypost LOGIN PASSWORD '$SERVER_PASSWORD';
CREATE ROLE standby LOGIN REPLICATION PASSWORD '$STANDBY_PASSWORD';
CREATE DATABASE waypost OWNER waypost_owner;
SELECT pg_create_physical_replication_slot('standby');
SQL
# `all` in the image's own lines is every database, and replication is none.
echo 'host replication standby all scram-sha-256' >>"$PGDATA/pg_hba.conf"
