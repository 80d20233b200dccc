// Browsers start no worker from a file:// page, so the site's search runs in a hidden frame there.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inner = frame.contentWindow;
      this.inner.postToPage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.ready = new Promise((resolve) => { this.inner.loaded = resolve; });
      const page = frame.contentDocument;
      page.open();
      page.write(`<script>
        postMessage = postToPage;
        importScripts = (...urls) => Promise.all(urls.map((src) => new Promise((resolve, reject) => {
          const script = Object.assign(document.createElement("script"), { src, onload: resolve, onerror: reject });
          document.body.append(script);
        })));
      <\/script><body><script src="${url}" onload="loaded()"><\/script>`);
      page.close();
    }
    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {}
  };
}
