// Tells the page's live parts that something happened: the service's events become one DOM event, which htmx listens
// for. At most one a second; nothing while the page is hidden, so that open tabs hold no connection. Progress makes no
// events of its own, so a page also looks by itself every few seconds.
(() => {
  "use strict";
  const EVERY = 1000, QUIET = 4000;
  const live = document.querySelector("[data-live]");
  if (!live) return;
  let source = null, last = 0, timer = null;

  const tell = () => {
    timer = null;
    last = Date.now();
    document.body.dispatchEvent(new CustomEvent("kdscale:change"));
  };
  const soon = () => {
    if (timer === null) timer = setTimeout(tell, Math.max(0, last + EVERY - Date.now()));
  };
  const listen = () => {
    if (source || !live.dataset.live || !window.EventSource) return;
    source = new EventSource(live.dataset.live);
    source.onmessage = soon;
  };
  const stop = () => {
    if (source) source.close();
    source = null;
  };

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return stop();
    listen();
    soon();
  });
  window.addEventListener("pagehide", stop);
  window.addEventListener("pageshow", (event) => { if (event.persisted) { listen(); soon(); } });
  setInterval(() => {
    const moves = !document.hidden && !live.querySelector("[data-ended]"); // of itself; events are heard anyway
    if (moves && Date.now() - last >= QUIET) soon();
  }, QUIET);
  last = Date.now();
  listen();
})();
