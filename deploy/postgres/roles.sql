-- The two roles of docker-compose.yml's database, made once, by its superuser, as psql runs it:
-- one that owns the tables and migrates them, and one that all others connect as, which can change
-- rows and nothing else. Triggers that seal the audit log are the owner's to take away.
\set owner_password `cat /run/secrets/owner_password`
\set service_password `cat /run/secrets/service_password`

CREATE ROLE backcast_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE backcast LOGIN PASSWORD :'service_password';

ALTER DATABASE :"DBNAME" OWNER TO backcast_owner;
REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC;
GRANT CONNECT ON DATABASE :"DBNAME" TO backcast;

ALTER SCHEMA public OWNER TO backcast_owner;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO backcast;

-- Of what migrations will make.
ALTER DEFAULT PRIVILEGES FOR ROLE backcast_owner IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO backcast;
ALTER DEFAULT PRIVILEGES FOR ROLE backcast_owner IN SCHEMA public
    GRANT USAGE, SELECT ON SEQUENCES TO backcast;  -- a backup notes which numbers were given
