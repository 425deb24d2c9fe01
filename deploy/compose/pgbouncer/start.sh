#!/bin/sh
# PgBouncer with the one user that waypost is, in front of the server that is the primary.
#
# In: SERVER_PASSWORD, which a file of the container has then, and PRIMARY. Never: changes a file that is mounted.
set -eu
umask 077
printf '"waypost" "%s"\n' "${SERVER_PASSWORD:?has to be set}" >/run/waypost/users.txt
printf '[databases]\nwaypost = host=%s port=5432\n' "${PRIMARY:?has to be set}" >/run/waypost/databases.ini
exec pgbouncer /etc/pgbouncer/pgbouncer.ini
