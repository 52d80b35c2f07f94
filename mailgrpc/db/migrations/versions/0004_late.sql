-- What comes late: claims, starts and results that the network, or a machine that stood still, held
-- back until their worker had given them up.

-- Of which database this is. A journal bears it, so that two installations on one directory do not
-- take each other's results.
CREATE TABLE installation (
    id   uuid NOT NULL DEFAULT gen_random_uuid(),
    one  boolean PRIMARY KEY DEFAULT true CHECK (one)
);
INSERT INTO installation DEFAULT VALUES;

-- A worker that does not know what became of a claim gives everything back and begins a new epoch on
-- that channel. What belongs to an earlier epoch, and comes after that, does nothing.
ALTER TABLE workers ADD COLUMN epochs jsonb NOT NULL DEFAULT '{}';  -- channel -> epoch
ALTER TABLE due ADD COLUMN epoch integer NOT NULL DEFAULT 0;  -- in which its session claimed it

DROP FUNCTION claim_due(bigint, text, integer, integer);
DROP FUNCTION start_deliveries(bigint, integer, uuid[], uuid[], uuid[]);

-- Lease up to p_limit due deliveries of a channel to a session. Changes no state.
--
-- Projects are served round robin, from the one after p_after_project on, each with an equal share
-- of the batch; within a project the higher priority goes first. Each range is read along the index,
-- so the cost does not depend on what waits elsewhere. A delivery with which two workers have died
-- is claimed alone: not beside others, and no others beside it, so that whoever dies next with it
-- says something about it, and nothing about its neighbours. One that was passed over for others is
-- named in a row without claims, and the next claim, with p_suspect, takes it before all else. Where
-- nothing was due, one row without delivery_id says in how many seconds something will be, by this
-- server's clock (NULL: nothing is waiting). A claim of an epoch before the one that has begun on the
-- channel is refused (MG003).
CREATE FUNCTION claim_due(
    p_session bigint, p_channel text, p_limit integer, p_after_project integer, p_epoch integer,
    p_suspect uuid
) RETURNS TABLE (
    delivery_id uuid, project_id integer, claims smallint, next_due_in_s double precision
) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_now      timestamptz := clock_timestamp();
    v_projects integer[];
    v_next     timestamptz;
    v_project  integer;
    v_priority smallint;
    v_left     integer := p_limit;
    v_share    integer;
    v_got      integer;
    v_plain    uuid[];
    v_suspect  uuid;
    v_passed   uuid;
    v_epoch     integer;
BEGIN
    -- Shared with other claims and starts, exclusive of the reaper: who got here is not ended
    -- before this transaction is, and its claims are then seen by the reaper.
    SELECT coalesce((w.epochs ->> p_channel)::integer, 0) INTO v_epoch
    FROM workers w WHERE w.id = p_session AND w.ended_at IS NULL FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'worker session % has ended', p_session USING ERRCODE = 'MG001';
    END IF;
    IF v_epoch > p_epoch THEN
        RAISE EXCEPTION 'a claim of epoch % comes after epoch % began', p_epoch, v_epoch
            USING ERRCODE = 'MG003';
    END IF;

    IF p_suspect IS NOT NULL THEN
        PERFORM FROM due d WHERE d.delivery_id = p_suspect AND d.channel = p_channel
            AND d.due_at <= v_now AND d.session_id IS NULL FOR UPDATE SKIP LOCKED;
        IF FOUND THEN
            RETURN QUERY UPDATE due d SET session_id = p_session, epoch = p_epoch,
                claims = d.claims + 1
            WHERE d.delivery_id = p_suspect
            RETURNING d.delivery_id, d.project_id, d.claims, NULL::double precision;
            RETURN;
        END IF;
    END IF;

    SELECT p.ready, p.next_due_at INTO v_projects, v_next
    FROM projects_with_due(p_channel, p_after_project, 64, v_now) p;
    FOREACH v_project IN ARRAY v_projects LOOP
        v_share := least(v_left, ceil(p_limit::numeric / cardinality(v_projects))::integer);
        FOREACH v_priority IN ARRAY ARRAY[40, 30, 20, 10]::smallint[] LOOP
            EXIT WHEN v_share <= 0;
            SELECT array_agg(p.delivery_id) FILTER (WHERE p.claims < 2),
                (array_agg(p.delivery_id) FILTER (WHERE p.claims >= 2))[1]
            INTO v_plain, v_suspect
            FROM (SELECT d.delivery_id, d.claims FROM due d
                WHERE d.channel = p_channel AND d.project_id = v_project
                    AND d.priority = v_priority AND d.due_at <= v_now AND d.session_id IS NULL
                ORDER BY d.due_at, d.delivery_id LIMIT v_share
                FOR UPDATE SKIP LOCKED) AS p;
            IF v_suspect IS NOT NULL AND v_left = p_limit THEN
                RETURN QUERY UPDATE due d SET session_id = p_session, epoch = p_epoch,
                    claims = d.claims + 1
                WHERE d.delivery_id = v_suspect
                RETURNING d.delivery_id, d.project_id, d.claims, NULL::double precision;
                RETURN;
            END IF;
            v_passed := coalesce(v_passed, v_suspect);
            RETURN QUERY UPDATE due d SET session_id = p_session, epoch = p_epoch,
                claims = d.claims + 1
            WHERE d.delivery_id = ANY (v_plain)
            RETURNING d.delivery_id, d.project_id, d.claims, NULL::double precision;
            GET DIAGNOSTICS v_got = ROW_COUNT;
            v_share := v_share - v_got;
            v_left := v_left - v_got;
        END LOOP;
        EXIT WHEN v_left <= 0;
    END LOOP;
    IF v_passed IS NOT NULL THEN
        RETURN QUERY SELECT v_passed, NULL::integer, NULL::smallint, NULL::double precision;
    ELSIF v_left = p_limit THEN
        RETURN QUERY SELECT NULL::uuid, NULL::integer, NULL::smallint,
            extract(epoch FROM v_next - v_now)::double precision;
    END IF;
END $$;

-- Move what this session claimed in this epoch to SENDING, each with its new attempt, and answer what
-- these attempts did start: asked again after a lost answer, with the same attempts, it starts nothing
-- twice. What is expired or suppressed by now is moved there instead.
CREATE FUNCTION start_deliveries(
    p_session bigint, p_lane integer, p_id uuid[], p_attempt uuid[], p_call uuid[],
    p_epoch integer
) RETURNS SETOF deliveries LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_mergejoin = off
SET enable_nestloop = off SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_now  timestamptz := clock_timestamp();
    v_mine uuid[];
    v_rest uuid[];
    v_first uuid := first_of(p_id);
    v_last uuid := last_of(p_id);
    v_rows deliveries[];
    v_old  smallint[];
BEGIN
    PERFORM FROM workers w WHERE w.id = p_session AND w.ended_at IS NULL FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'worker session % has ended', p_session USING ERRCODE = 'MG001';
    END IF;
    SELECT array_agg(q.delivery_id) INTO v_mine FROM (
        SELECT q.delivery_id FROM due q
        WHERE q.delivery_id = ANY (p_id) AND q.session_id = p_session AND q.epoch = p_epoch
        ORDER BY q.delivery_id FOR UPDATE
    ) q;

    WITH held AS MATERIALIZED (
        SELECT d.* FROM deliveries d
        WHERE d.id = ANY (v_mine) AND d.id BETWEEN v_first AND v_last
            AND d.state IN (1, 3) ORDER BY d.id FOR UPDATE
    ), verdict AS (
        SELECT d.id, d.state AS old_state, a.attempt_id, a.call_id, v.reason,
            CASE WHEN d.expire_at <= v_now THEN 12 WHEN v.reason > 0 THEN 10 ELSE 2 END AS state
        FROM held d
        JOIN unnest(p_id, p_attempt, p_call) AS a(id, attempt_id, call_id) ON a.id = d.id
        CROSS JOIN LATERAL (SELECT coalesce(
            (SELECT s.reason FROM suppressions s
                WHERE s.project_id = d.project_id AND s.address = d.recipient),
            (SELECT 1 FROM preferences p WHERE p.project_id = d.project_id
                AND p.address = d.recipient AND p.blocked_flags & d.flags & ~1 <> 0),
            0)::smallint AS reason OFFSET 0) AS v
    ), moved AS (
        UPDATE deliveries d SET state = v.state, state_since = v_now, version = d.version + 1,
            wait_reason = 0, due_at = NULL,
            suppression_reason = CASE WHEN v.state = 10 THEN v.reason ELSE 0 END,
            attempt_count = d.attempt_count + (v.state = 2)::integer,
            attempt_id = CASE WHEN v.state = 2 THEN v.attempt_id END,
            call_id = CASE WHEN v.state = 2 THEN v.call_id ELSE d.call_id END,
            attempt_started_at = CASE WHEN v.state = 2 THEN v_now ELSE d.attempt_started_at END
        FROM verdict v WHERE d.id = v.id AND d.id = ANY (v_mine) AND d.id BETWEEN v_first AND v_last
        RETURNING d AS row, v.old_state
    )
    SELECT array_agg(m.row ORDER BY (m.row).id), array_agg(m.old_state ORDER BY (m.row).id)
    INTO v_rows, v_old FROM moved m;

    -- What did not move: a start before this one did, it was suppressed or expired, or its due row
    -- has no business here any more.
    SELECT array_agg(m.id) INTO v_rest FROM unnest(v_mine) AS m(id)
    LEFT JOIN unnest(v_rows) AS r ON r.id = m.id AND r.state = 2 WHERE r.id IS NULL;
    IF v_rest IS NULL THEN
        -- Nobody has had an attempt that ended and is told by this.
        PERFORM append_events(p_lane, v_rows, v_old, '');
        RETURN QUERY SELECT r.* FROM unnest(v_rows) AS r;
        RETURN;
    END IF;
    DELETE FROM due q WHERE q.delivery_id = ANY (v_rest)
        AND NOT EXISTS (SELECT FROM deliveries d WHERE d.id = ANY (v_rest)
            AND d.id BETWEEN v_first AND v_last AND d.id = q.delivery_id AND d.state = 2);
    PERFORM append_events(p_lane, v_rows, v_old, '', v_first, v_last);
    RETURN QUERY SELECT d.* FROM unnest(p_id, p_attempt) AS a(id, attempt_id)
        JOIN deliveries d ON d.id = a.id AND d.attempt_id = a.attempt_id
        WHERE d.id = ANY (v_mine) AND d.id BETWEEN v_first AND v_last ORDER BY d.id;
END $$;

-- Give back what a session holds and has not started: these rows (NULL: all) of a channel (NULL: of
-- all). How many. p_lost: their worker ended with them, and each row's count of claims stands.
--
-- A start may be under way: it locks its rows in `due` first, as this does, and what it did is seen by
-- the second statement, which looks after the locks were had.
--
-- Without ids it reads all of `due`, which has no index on sessions so that claims stay cheap.
CREATE FUNCTION release_claims(
    p_session bigint, p_lost boolean, p_channel text DEFAULT NULL, p_id uuid[] DEFAULT NULL
) RETURNS integer LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_id    uuid[] := p_id;
    v_first uuid;
    v_last  uuid;
    v_count integer;
BEGIN
    IF p_id IS NULL THEN
        SELECT array_agg(q.delivery_id) INTO v_id FROM due q
        WHERE q.session_id = p_session AND (p_channel IS NULL OR q.channel = p_channel);
    END IF;
    PERFORM FROM due q WHERE q.delivery_id = ANY (v_id) AND q.session_id = p_session
        ORDER BY q.delivery_id FOR UPDATE;
    v_first := first_of(v_id);
    v_last := last_of(v_id);
    -- A row whose delivery is gone is given back as well: who claims it drops it.
    UPDATE due q SET session_id = NULL,
        claims = CASE WHEN p_lost THEN q.claims ELSE greatest(q.claims - 1, 0) END
    WHERE q.delivery_id = ANY (v_id) AND q.session_id = p_session
        AND NOT EXISTS (SELECT FROM deliveries d WHERE d.id = q.delivery_id AND d.id = ANY (v_id)
            AND d.id BETWEEN v_first AND v_last AND d.state = 2);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN v_count;
END $$;

-- Write what attempts came to: each to its attempt always, and to its delivery
--   where that attempt is the one that is running: the state in p_state; but what another attempt is
--   known to have had accepted, since it was last forced, is not tried again (3) and not called
--   unknown (9): it is SENT (4);
--   where it was taken for lost, the result is news to it, and the state is one of p_without_proof:
--   the state in p_late_state (NULL: none), for the last one started. Of one that was overtaken only
--   its acceptance counts, and not where a newer attempt is forced. Proof that it was not sent, but
--   could have been tried again (outcome 2), ends OUTCOME_UNKNOWN (9) and nothing else, and that only
--   where no other attempt was accepted or is in doubt.
-- p_spares: the attempt does not count against the policy, and what was forced stays so.
-- "The last one started" is also one that this database never saw start, because its primary failed
-- over without the last commits: its number is then ahead of the delivery's.
-- "News": the attempt had no row, or an UNKNOWN one. So running it again after a commit whose
-- answer was lost moves nothing a second time, not even when Resend has moved it since.
CREATE OR REPLACE FUNCTION record_outcomes(
    p_lane integer, p_id uuid[], p_attempt uuid[], p_number integer[], p_call uuid[],
    p_channel text[], p_provider text[], p_started_at timestamptz[], p_ended_at timestamptz[],
    p_outcome smallint[], p_cause smallint[], p_status_code integer[], p_enhanced_code text[],
    p_text text[], p_provider_message_id text[], p_retry_after_ms integer[],
    p_state smallint[], p_possibly_sent boolean[], p_due_at timestamptz[], p_wait_reason smallint[],
    p_spares boolean[], p_late_state smallint[], p_without_proof smallint[]
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_mergejoin = off
SET enable_nestloop = off SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_now  timestamptz := clock_timestamp();
    v_first uuid := first_of(p_id);
    v_last uuid := last_of(p_id);
    v_here uuid[];
    v_sent uuid[];
    v_news uuid[];
    v_rows deliveries[];
    v_late deliveries[];
    v_old  smallint[];
BEGIN
    PERFORM FROM due q WHERE q.delivery_id = ANY (p_id) ORDER BY q.delivery_id FOR UPDATE;
    SELECT array_agg(d.id) INTO v_here FROM (SELECT d.id FROM deliveries d
        WHERE d.id = ANY (p_id) AND d.id BETWEEN v_first AND v_last ORDER BY d.id FOR UPDATE) AS d;

    WITH written AS (
        INSERT INTO attempts AS a (delivery_id, number, id, call_id, channel, provider, started_at,
            ended_at, outcome, cause, status_code, enhanced_code, text, provider_message_id,
            retry_after_ms)
        SELECT r.* FROM unnest(p_id, p_number, p_attempt, p_call, p_channel, p_provider,
                p_started_at, p_ended_at, p_outcome, p_cause, p_status_code, p_enhanced_code,
                p_text, p_provider_message_id, p_retry_after_ms) AS r(delivery_id)
        WHERE cardinality(v_here) = cardinality(p_id) OR r.delivery_id = ANY (v_here)  -- else it was cleared
        ON CONFLICT (delivery_id, number) DO UPDATE SET
            provider = excluded.provider, ended_at = excluded.ended_at, outcome = excluded.outcome,
            cause = excluded.cause, status_code = excluded.status_code,
            enhanced_code = excluded.enhanced_code, text = excluded.text,
            provider_message_id = excluded.provider_message_id,
            retry_after_ms = excluded.retry_after_ms
            WHERE a.id = excluded.id AND a.outcome = 4
        RETURNING a.delivery_id
    )
    SELECT array_agg(w.delivery_id) INTO v_news FROM written w;

    -- Nothing is tried again, or called unknown, of which another attempt is known to be accepted.
    -- What Resend has forced was wanted in spite of what came before.
    IF p_state && ARRAY[3, 9]::smallint[] THEN
        SELECT array_agg(d.id) INTO v_sent FROM deliveries d
        WHERE d.id = ANY (p_id) AND d.id BETWEEN v_first AND v_last AND NOT d.forced
            AND EXISTS (SELECT FROM attempts a WHERE a.delivery_id = d.id
                AND a.delivery_id = ANY (p_id) AND a.delivery_id BETWEEN v_first AND v_last
                AND a.outcome = 1);
    END IF;

    WITH moved AS (
        UPDATE deliveries d SET state = CASE WHEN r.is_sent THEN 4 ELSE r.state END,
            state_since = v_now, version = d.version + 1, possibly_sent = r.possibly_sent,
            due_at = CASE WHEN r.is_sent THEN NULL ELSE r.due_at END,
            wait_reason = CASE WHEN r.is_sent THEN 0 ELSE r.wait_reason END,
            attempt_id = NULL, forced = d.forced AND r.spares, spared = d.spared + r.spares::integer
        FROM (SELECT r.*, coalesce(r.state IN (3, 9) AND r.id = ANY (v_sent), false) AS is_sent
            FROM unnest(p_id, p_attempt, p_state, p_possibly_sent, p_due_at, p_wait_reason, p_spares)
                AS r(id, attempt_id, state, possibly_sent, due_at, wait_reason, spares)) AS r
        WHERE d.id = r.id AND d.id = ANY (p_id) AND d.id BETWEEN v_first AND v_last
            AND d.state = 2 AND d.attempt_id = r.attempt_id
        RETURNING d.*
    )
    SELECT array_agg(ROW(m.*)::deliveries ORDER BY m.id) INTO v_rows FROM moved m;

    IF coalesce(cardinality(v_rows), 0) < cardinality(p_id) THEN
        WITH held AS MATERIALIZED (
            SELECT d.id, d.state AS old_state, r.state, r.number,
                CASE WHEN r.outcome = 1 THEN d.possibly_sent ELSE v.may_have_left END AS possibly_sent
            FROM deliveries d
            JOIN unnest(p_id, p_number, p_outcome, p_late_state) AS r(id, number, outcome, state)
                ON r.id = d.id
            CROSS JOIN LATERAL (SELECT EXISTS (SELECT FROM attempts a WHERE a.delivery_id = d.id
                AND a.delivery_id BETWEEN v_first AND v_last AND a.number <> r.number AND a.outcome IN (1, 4)) AS may_have_left) AS v
            WHERE d.id = ANY (v_news) AND d.id BETWEEN v_first AND v_last
                AND d.state = ANY (p_without_proof)
                AND r.state IS NOT NULL
                AND (d.attempt_count <= r.number OR (r.outcome = 1 AND NOT d.forced))
                AND (r.outcome <> 2 OR (d.state = 9 AND NOT v.may_have_left))
                AND d.id NOT IN (SELECT m.id FROM unnest(v_rows) AS m)
        ), moved AS (
            UPDATE deliveries d SET state = h.state, state_since = v_now, version = d.version + 1,
                due_at = NULL, wait_reason = 0, forced = false, attempt_count = greatest(d.attempt_count, h.number),
                possibly_sent = h.possibly_sent
            FROM held h WHERE d.id = h.id AND d.id = ANY (v_news) AND d.id BETWEEN v_first AND v_last
            RETURNING d AS row, h.old_state
        )
        SELECT array_agg(m.row ORDER BY (m.row).id), array_agg(m.old_state ORDER BY (m.row).id)
        INTO v_late, v_old FROM moved m;
        DELETE FROM scheduled s WHERE s.delivery_id IN (SELECT l.id FROM unnest(v_late) AS l);
    END IF;

    PERFORM settle_due(v_now, v_rows || v_late);
    PERFORM append_events(p_lane, v_rows || v_late,
        array_fill(2::smallint, ARRAY[coalesce(cardinality(v_rows), 0)]) || v_old, '',
        v_first, v_last);
END $$;

-- What was left to a retry though an overtaken attempt had been accepted. All that waits has a row
-- in one of the two queues, which are small beside the history.
DO $$
DECLARE
    v_id uuid[];
BEGIN
    SELECT array_agg(d.id ORDER BY d.id) INTO v_id
    FROM (SELECT delivery_id FROM due UNION ALL SELECT delivery_id FROM scheduled) q
    JOIN deliveries d ON d.id = q.delivery_id
    WHERE d.state IN (1, 3) AND d.attempt_count > 1 AND NOT d.forced
        AND (SELECT true FROM attempts a WHERE a.delivery_id = d.id AND a.outcome = 1 LIMIT 1);
    PERFORM move_deliveries(0, '', v_id, array_agg(d.version ORDER BY d.id),
        array_fill(4::smallint, ARRAY[count(*)::integer]),
        array_fill(NULL::timestamptz, ARRAY[count(*)::integer]),
        array_fill(0::smallint, ARRAY[count(*)::integer]),
        array_fill(false, ARRAY[count(*)::integer]),
        array_agg(d.possibly_sent ORDER BY d.id), array_agg(d.expire_at ORDER BY d.id))
    FROM deliveries d WHERE d.id = ANY (v_id) HAVING count(*) > 0;
END $$;
