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
--   else, and that only where no other attempt is in doubt.
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
                CASE WHEN r.outcome = 1 THEN d.possibly_sent ELSE v.in_doubt END AS possibly_sent
            FROM deliveries d
            JOIN unnest(p_id, p_number, p_outcome, p_late_state) AS r(id, number, outcome, state)
                ON r.id = d.id
            CROSS JOIN LATERAL (SELECT EXISTS (SELECT FROM attempts a
                WHERE a.delivery_id = d.id AND a.outcome = 4) AS in_doubt) AS v
            WHERE d.id = ANY (v_news) AND d.state = ANY (p_without_proof)
                AND d.attempt_count <= r.number AND r.state IS NOT NULL
                AND (r.outcome <> 2 OR (d.state = 9 AND NOT v.in_doubt))
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
