-- What delivery under faults needs of the schema.

-- Attempts that say nothing about the mail, because the channel failed as a whole or the worker's
-- lease ran out before the mail left, are made and shown and do not count against the policy.
ALTER TABLE deliveries ADD COLUMN spared integer NOT NULL DEFAULT 0;

-- A session's id is drawn at random (worker/sessions.py): a sequence that went back in a fail-over
-- would give two workers one session, and neither could be ended without the other.
ALTER TABLE workers ALTER COLUMN id DROP IDENTITY;
ALTER TABLE workers
    -- By whose lease a session is judged: its own, whatever the setting of who looks.
    ADD COLUMN lease_s double precision NOT NULL DEFAULT 30,
    ADD COLUMN held text NOT NULL DEFAULT '',      -- why it starts nothing; empty: it does
    ADD COLUMN paused text[] NOT NULL DEFAULT '{}'; -- channels that failed as a whole

DROP FUNCTION record_outcomes(integer, uuid[], uuid[], integer[], uuid[], text[], text[],
    timestamptz[], timestamptz[], smallint[], smallint[], integer[], text[], text[], text[], integer[],
    smallint[], boolean[], timestamptz[], smallint[], smallint[], smallint[]);

-- Write what attempts came to: each to its attempt always, and to its delivery
--   where that attempt is the one that is running: the state in p_state;
--   where it was taken for lost and is still the last one started, the result is news to it, and
--   the state is one of p_without_proof: the state in p_late_state (NULL: none). Proof that it was
--   not sent, but could have been tried again (outcome 2), ends OUTCOME_UNKNOWN (9) and nothing
--   else, and that only where no other attempt was accepted or is in doubt.
-- p_spares: the attempt does not count against the policy, and what was forced stays so.
-- "The last one started" is also one that this database never saw start, because its primary failed
-- over without the last commits: its number is then ahead of the delivery's.
-- "News": the attempt had no row, or an UNKNOWN one. So running it again after a commit whose
-- answer was lost moves nothing a second time, not even when Resend has moved it since.
CREATE FUNCTION record_outcomes(
    p_lane integer, p_id uuid[], p_attempt uuid[], p_number integer[], p_call uuid[],
    p_channel text[], p_provider text[], p_started_at timestamptz[], p_ended_at timestamptz[],
    p_outcome smallint[], p_cause smallint[], p_status_code integer[], p_enhanced_code text[],
    p_text text[], p_provider_message_id text[], p_retry_after_ms integer[],
    p_state smallint[], p_possibly_sent boolean[], p_due_at timestamptz[], p_wait_reason smallint[],
    p_spares boolean[], p_late_state smallint[], p_without_proof smallint[]
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_now  timestamptz := clock_timestamp();
    v_news uuid[];
    v_rows deliveries[];
    v_late deliveries[];
    v_old  smallint[];
BEGIN
    PERFORM FROM due q WHERE q.delivery_id = ANY (p_id) ORDER BY q.delivery_id FOR UPDATE;
    PERFORM FROM deliveries d WHERE d.id = ANY (p_id) ORDER BY d.id FOR UPDATE;

    WITH written AS (
        INSERT INTO attempts AS a (delivery_id, number, id, call_id, channel, provider, started_at,
            ended_at, outcome, cause, status_code, enhanced_code, text, provider_message_id,
            retry_after_ms)
        SELECT r.* FROM unnest(p_id, p_number, p_attempt, p_call, p_channel, p_provider,
                p_started_at, p_ended_at, p_outcome, p_cause, p_status_code, p_enhanced_code,
                p_text, p_provider_message_id, p_retry_after_ms) AS r(delivery_id)
        WHERE EXISTS (SELECT FROM deliveries d WHERE d.id = r.delivery_id)  -- else it was cleared
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

    WITH moved AS (
        UPDATE deliveries d SET state = r.state, state_since = v_now, version = d.version + 1,
            possibly_sent = r.possibly_sent, due_at = r.due_at, wait_reason = r.wait_reason,
            attempt_id = NULL, forced = d.forced AND r.spares, spared = d.spared + r.spares::integer
        FROM unnest(p_id, p_attempt, p_state, p_possibly_sent, p_due_at, p_wait_reason, p_spares)
            AS r(id, attempt_id, state, possibly_sent, due_at, wait_reason, spares)
        WHERE d.id = r.id AND d.state = 2 AND d.attempt_id = r.attempt_id
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
                AND a.number <> r.number AND a.outcome IN (1, 4)) AS may_have_left) AS v
            WHERE d.id = ANY (v_news) AND d.state = ANY (p_without_proof)
                AND d.attempt_count <= r.number AND r.state IS NOT NULL
                AND (r.outcome <> 2 OR (d.state = 9 AND NOT v.may_have_left))
                AND d.id NOT IN (SELECT m.id FROM unnest(v_rows) AS m)
        ), moved AS (
            UPDATE deliveries d SET state = h.state, state_since = v_now, version = d.version + 1,
                due_at = NULL, wait_reason = 0, forced = false, attempt_count = h.number,
                possibly_sent = h.possibly_sent
            FROM held h WHERE d.id = h.id
            RETURNING d AS row, h.old_state
        )
        SELECT array_agg(m.row ORDER BY (m.row).id), array_agg(m.old_state ORDER BY (m.row).id)
        INTO v_late, v_old FROM moved m;
        DELETE FROM scheduled s WHERE s.delivery_id IN (SELECT l.id FROM unnest(v_late) AS l);
    END IF;

    PERFORM settle_due(v_now, v_rows || v_late);
    PERFORM append_events(p_lane, v_rows || v_late,
        array_fill(2::smallint, ARRAY[coalesce(cardinality(v_rows), 0)]) || v_old, '');
END $$;

-- Lease up to p_limit due deliveries of a channel to a session. Changes no state.
--
-- Projects take turns, from the one after p_after_project on, each with an equal share of the
-- batch; within a project the higher priority goes first. Each range is read along the index, so
-- the cost does not depend on what waits elsewhere. A delivery with which two workers have died is
-- claimed alone: not beside others, and no others beside it, so that whoever dies next with it says
-- something about it, and nothing about its neighbours. Where nothing was due, one row without
-- delivery_id says in how many seconds something will be, by this server's clock (NULL: nothing
-- is waiting).
CREATE OR REPLACE FUNCTION claim_due(
    p_session bigint, p_channel text, p_limit integer, p_after_project integer
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
BEGIN
    -- Shared with other claims and starts, exclusive of the reaper: who got here is not ended
    -- before this transaction is, and its claims are then seen by the reaper.
    PERFORM FROM workers w WHERE w.id = p_session AND w.ended_at IS NULL FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'worker session % has ended', p_session USING ERRCODE = 'MG001';
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
                RETURN QUERY UPDATE due d SET session_id = p_session, claims = d.claims + 1
                WHERE d.delivery_id = v_suspect
                RETURNING d.delivery_id, d.project_id, d.claims, NULL::double precision;
                RETURN;
            END IF;
            RETURN QUERY UPDATE due d SET session_id = p_session, claims = d.claims + 1
            WHERE d.delivery_id = ANY (v_plain)
            RETURNING d.delivery_id, d.project_id, d.claims, NULL::double precision;
            GET DIAGNOSTICS v_got = ROW_COUNT;
            v_share := v_share - v_got;
            v_left := v_left - v_got;
        END LOOP;
        EXIT WHEN v_left <= 0;
    END LOOP;
    IF v_left = p_limit THEN
        RETURN QUERY SELECT NULL::uuid, NULL::integer, NULL::smallint,
            extract(epoch FROM v_next - v_now)::double precision;
    END IF;
END $$;
