#!/bin/sh
# PgBouncer with the one user that waypost is; its password comes from the environment, and a file of the container has it.
set -eu
umask 077
printf '"waypost" "%s"\n' "${SERVER_PASSWORD:?has to be set}" >/run/waypost/users.txt
exec pgbouncer /etc/pgbouncer/pgbouncer.ini
